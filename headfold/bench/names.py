"""Names of implementations and kinds of cases that mean something by themselves."""

OWN = "headfold"
# Its attention alone, over a cache to which the tokens were appended before.
APPENDED = "headfold-appended"
# Implementations whose names begin so are PyTorch's own ways: the fastest of them is "PyTorch's best".
TORCH_PREFIX = "torch-"

# Kinds of cases whose figure is TFLOP/s, not GB/s.
PREFILLS = ("prefill", "ragged prefill")
