"""Expert routing and the routed experts as one operator."""
