"""The PyTorch reference of the DeepSeek-VL2 family, written to be exported."""
