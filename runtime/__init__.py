"""The device half: an exported bundle answers questions about images, with NumPy and one backend, without torch.

    from vl2.runtime import open_bundle
    model = open_bundle("tiny.bundle")
    print(model.ask("What is shown?", images=["a.png"]).text)
"""

from vl2.runtime.answer import Answer, AnswerStream
from vl2.runtime.bundle import open_bundle
from vl2.runtime.constraints import Constraint
from vl2.runtime.model import Chat, Model
from vl2.runtime.options import BundleOptions, GenerationOptions

__all__ = ["Answer", "AnswerStream", "BundleOptions", "Chat", "Constraint", "GenerationOptions", "Model", "open_bundle"]
