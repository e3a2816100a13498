"""Finds something in an image and draws its boxes: python examples/draw_boxes.py BUNDLE IMAGE QUESTION OUT.png

vl2-nano knows `Locate the word Total.`, the published models `<|ref|>the red car<|/ref|>`.
"""

import json
import sys

from vl2.image import load_image
from vl2.runtime import open_bundle
from vl2.runtime.grounding import draw

bundle, path, question, out = sys.argv[1:]
image = load_image(path)
answer = open_bundle(bundle).ask(question, images=[image])
for box in answer.boxes:
    # `box` holds the model's own 0 to 999, `pixels` those of this image.
    print(json.dumps(box.to_dict(image.size), ensure_ascii=False))
for problem in answer.box_problems:
    print(f"not read: {problem}", file=sys.stderr)
draw(image, answer.boxes).save(out)
