"""Triton kernels on NF4 weights: functions of tensors that know torch and triton and nothing of phicore.

Each kernel's file holds its function, the launch that the function makes, and a naive torch version of its formula.
Importing this package alone imports neither torch nor triton.
"""
