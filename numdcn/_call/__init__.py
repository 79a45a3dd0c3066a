"""What every door does before and after the kernels: arguments, where arrays live, results, scratch memory."""
