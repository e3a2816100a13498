"""Compares the graphs of a bundle with the PyTorch model."""
def verify_bundle(folder, manifest, checkpoint, progress):
    raise NotImplementedError
