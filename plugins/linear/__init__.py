"""Matrix products with weights of few bits (`linear.cc`); signature in plugins/native/README.md."""
