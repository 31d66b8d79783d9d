"""The Space on the Hugging Face Hub: `timm-tresnet demo` with weights that are worth comparing."""

from timm_tresnet.demo.page import build_demo, serve_demo

WEIGHTS = [
    "tresnet_m.miil_in21k_ft_in1k",
    "tresnet_m.miil_in1k",
    "tresnet_l.miil_in1k",
    "tresnet_v2_l.miil_in21k_ft_in1k",
    "test_tresnet.r64_cifar10",
]

if __name__ == "__main__":
    serve_demo(build_demo(WEIGHTS, beside="tresnet_v2_l.miil_in21k_ft_in1k"))
