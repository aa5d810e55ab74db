"""Names of implementations that mean something by themselves."""

OWN = "headfold"
# Implementations whose names begin so are PyTorch's own ways: the fastest of them is "PyTorch's best".
TORCH_PREFIX = "torch-"
