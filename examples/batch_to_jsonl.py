"""The same question about every image of a folder, a line of JSON each; run again, it goes on where it was stopped.

python examples/batch_to_jsonl.py BUNDLE FOLDER "What is the total?" OUT.jsonl
"""

import json
import sys
from pathlib import Path

from vl2.errors import VL2Error
from vl2.runtime import GenerationOptions, open_bundle

bundle, folder, question, out = sys.argv[1:]
images = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
with open(out, "a+", encoding="utf-8") as lines:
    lines.seek(0)
    whole = [line for line in lines if line.endswith("\n")]
    # A line that was being written when the program was ended is written again.
    lines.truncate(sum(len(line.encode()) for line in whole))
    done = {json.loads(line)["image"] for line in whole}
    model, options = open_bundle(bundle), GenerationOptions(max_new_tokens=128)
    for number, path in enumerate(images, 1):
        if path.name in done:
            continue
        try:
            answer = model.ask(question, images=[path], options=options)
            boxes = [box.to_dict(answer.image_size) for box in answer.boxes]
            row = {"image": path.name, "text": answer.text, "boxes": boxes}
        except VL2Error as error:  # one broken image does not end the batch
            row = {"image": path.name, "error": str(error)}
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        lines.flush()
        print(f"{number} of {len(images)}: {path.name}", file=sys.stderr)
