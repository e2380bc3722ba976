"""Cost of the compiled Triton kernels, from their machine code and without a GPU.

====================  ==================================================================================
``compile_check.py``  compile every kernel, and fail where one is over its budget
``cost.py``           what a kernel costs: instructions, occupancy, loads in flight, predicted time
``machine_code.py``   reader of NVIDIA's and AMD's machine code
====================  ==================================================================================
"""
