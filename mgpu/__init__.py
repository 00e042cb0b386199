"""mgpu runs local LLM engines on several GPUs: it plans, launches, proves and watches them."""

__version__ = "0.1.0"
