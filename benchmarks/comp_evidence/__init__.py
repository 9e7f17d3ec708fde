"""Does pruning together help? Joint against single modes, CIM against independent scores, MPS against a fixed order.

python -m benchmarks.comp_evidence run [--arm A ...] [--flops F ...] [--seed S ...] [--tuned T ...] [--time-limit MIN]
python -m benchmarks.comp_evidence tables

Cells are JSON files in benchmarks/results/comp; those that are there are not made again.
"""
