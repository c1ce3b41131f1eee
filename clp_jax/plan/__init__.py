"""What a config costs on a TPU slice, from its compiled programs, without one.

1. `chips.py` has the published figures of each generation of TPU, and the
   devices of a slice of any size.
2. `programs.py` compiles the programs that training runs, on shapes alone.
3. `hlo.py` counts FLOPs, bytes and collectives in what the compiler made.
4. `roofline.py` puts both together: bytes by kind, a roofline, and advice.
"""
