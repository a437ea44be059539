"""placeholder"""
def triton_interpreted() -> bool:
    return False
def why_no_cpu():
    return "not built"
def why_no_triton():
    return "n/a"
def why_no_cuda():
    return "n/a"
