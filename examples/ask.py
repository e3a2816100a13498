"""One question about an image, the answer streamed: python examples/ask.py BUNDLE IMAGE "What is the total?" """

import sys

from vl2.runtime import open_bundle

bundle, image, question = sys.argv[1:]
stream = open_bundle(bundle).stream(question, images=[image])
for piece in stream:
    print(piece, end="", flush=True)
print()
answer = stream.answer
print(f"{len(answer.token_ids)} tokens, {answer.encode_ms:.0f} ms for the image, {answer.prefill_ms:.0f} ms to the "
      f"first token, {answer.peak_rss_bytes / 1e6:.0f} MB", file=sys.stderr)
