"""A conversation about two images; of each question only what is new is computed.

python examples/chat_about_two_images.py BUNDLE FIRST SECOND
"""

import sys

from vl2.runtime import GenerationOptions, open_bundle

bundle, first, second = sys.argv[1:]
chat = open_bundle(bundle).chat()
options = GenerationOptions(max_new_tokens=64)
# <image> says where an image stands in the text; without it images come first.
turns = [
    ("This is the first page: <image>\nWhat does it say?", [first]),
    ("And this is the second one: <image>\nWhat does it say?", [second]),
    ("What is the total on the first page?", []),
]
for question, images in turns:
    answer = chat.ask(question, images, options)
    print(f"> {question}\n{answer.text}")
    print(f"  ({answer.prompt_tokens} prompt tokens, {answer.reused_tokens} of them kept)")
