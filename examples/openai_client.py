"""Asks a running `vl2 serve` with OpenAI's own client (pip install openai):

vl2 serve BUNDLE &
python examples/openai_client.py http://127.0.0.1:8000/v1 IMAGE "What is the total?"
"""

import base64
import mimetypes
import os
import sys
from pathlib import Path

from openai import OpenAI

url, image, question = sys.argv[1:]
# Without a token any key will do.
client = OpenAI(base_url=url, api_key=os.environ.get("VL2_SERVE_TOKEN", "none"))
kind = mimetypes.guess_type(image)[0] or "image/png"
data = base64.b64encode(Path(image).read_bytes()).decode()
content = [
    {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}},
    {"type": "text", "text": question},
]
stream = client.chat.completions.create(
    model=client.models.list().data[0].id, messages=[{"role": "user", "content": content}], max_tokens=128, stream=True
)
for chunk in stream:
    choice = chunk.choices[0]
    print(choice.delta.content or "", end="", flush=True)
    if choice.finish_reason:
        print()
        # What OpenAI's form has no word for: boxes with label, 0 to 999 and pixels.
        for box in choice.model_extra["boxes"]:
            print(f"{box['label']}: {box['pixels']}")
