"""The zoo: tiny random models of transformers' architectures, captured, tagged, pruned, exported and compared."""
