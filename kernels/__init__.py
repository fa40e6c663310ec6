"""Functions on tensors. A backend is a value: one `Ops` table (`kernels/ops.py`)."""
