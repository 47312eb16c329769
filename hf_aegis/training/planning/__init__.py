"""What a training will take, from shapes alone: memory and floating-point operations of a step."""
