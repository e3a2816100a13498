"""The operator library in C++ and the layout of its weights."""
