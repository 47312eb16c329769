"""Pure functions of tensors and strings: no modules, no state, no input or output."""
