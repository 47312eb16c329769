"""
What an anchor holds of single linear layers: principal subspaces of their inputs, and the predictions' sensitivity to
their weights. Files: `names` finds the layers, `inputs` and `second_moments` reduce what they read, `subspaces` and
`sensitivities` are what remains, and `packing` turns that into tensors and JSON.
"""
