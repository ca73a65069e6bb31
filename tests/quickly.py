"""How a program is compiled that takes longer to compile than to run: hardly optimized, in one part."""

OPTIONS = {
    "xla_backend_optimization_level": 0,  # XLA's default is 3
    "xla_cpu_use_fusion_emitters": False,  # half of what compiling takes
    "xla_cpu_parallel_codegen_split_count": 1,  # each part has a price
}
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in OPTIONS.items())
