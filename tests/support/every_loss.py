"""Every loss of a recipe, from resnet8 to wrn_16_1."""

ALL = {
    "ce": {"weight": 1},
    "at": {"beta": 100, "pairs": [["layer2", "block2"], ["layer3", "block3"]]},
    "sp": {"preset": "paper", "pairs": [["layer3", "block3"], ["layer2", "block2"]]},
    "kd": {"alpha": 0.9},
    "dist": {"weight": 1},
    "dkd": {"beta": 8},
    "pkt": {"preset": "repdistiller", "pairs": [["layer3", "block3"]]},
    "cc": {"weight": 0.02, "pairs": [["layer3", "block3"]]},
    "cka": {"weight": 1, "pairs": [["layer3", "block3"]]},
    "rkd": {"preset": "paper", "pairs": [["layer3", "block3"]]},
    "fitnet": {"preset": "repdistiller", "pairs": [["layer2", "block2"]]},
    "srd": {"weight": 0.1, "adapter": "linear_bn", "pairs": [["layer3", "block3"]]},
    "vid": {"weight": 0.1, "pairs": [["layer2", "block2"]]},
    "review": {"weight": 0.1, "pairs": [["layer2", "block2"], ["layer3", "block3"]]},
    "crd": {"weight": 0.1, "negatives": 50, "pairs": [["layer3", "block3"]]},
    "queue": {"weight": 0.1, "size": 64, "adapter": "linear", "pairs": [["layer3", "block3"]]},
}
