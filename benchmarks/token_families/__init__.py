"""Token pruning on architectures that no test knows: sites or refusals, and what token pruning promises, one by one."""
