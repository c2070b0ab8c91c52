"""Benchmarks, `python -m lab bench {branches,finetune,masked,train,data}`: ratios of arms that take turns.

A case is one comparison at one size. Each restart is a fresh process in which the arms take turns, so that a slow phase
of the machine meets all of them; the restart is the unit. Beside each time stand the operations and bytes of the step,
counted, and their share of what this device reaches in a large matrix product and a large copy. Results go to
outputs/<profile>/bench/<name>.csv, one row a restart and arm, as each case is done.

Runs where only torch and timm are: standard library for the tables.
"""
