"""What the compiled Triton kernels cost on GPUs that are not present, read from their machine code.

====================  ==================================================================================
``compile_check.py``  compile every kernel, and fail where one is over its budget
``cost.py``           what a kernel costs: instructions, occupancy, loads in flight, predicted time
``machine_code.py``   reader of NVIDIA's and AMD's machine code
====================  ==================================================================================
"""
