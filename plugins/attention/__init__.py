"""Multi-head attention over key and value buffers written in place, as one operator."""
