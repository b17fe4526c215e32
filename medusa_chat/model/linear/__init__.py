"""Linear layers in the form that runs fastest on a device.

joined.py        layers that read the same rows, as one matrix
packed.py        weights laid out once as the CPU's matmul wants them
quantization.py  bitsandbytes layers: settings, single layers, and what a checkpoint holds
"""
