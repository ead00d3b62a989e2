"""Hand-worked cases: what `compute` must give, to 1e-6."""

test_cases = [
    {  # cosines with the wrong text: 0, 0, 0.6; of the pairs of images: 0, 0.6, 0.8
        "image_embeds": [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]],
        "labels": [0, 1, 1],
        "text_embeds": [[1.0, 0.0], [0.0, 1.0]],
        "result": {"inter": 0.6 / 3, "intra": 1.4 / 3, "iimm": 1.0 / 3, "n_images": 3},
    },
    {  # scales do not count; captions: text i belongs to image i
        "image_embeds": [[5.0, 0.0], [0.0, 0.1]],
        "labels": [0, 1],
        "text_embeds": [[3.0, 4.0], [0.0, 2.0]],
        "result": {"inter": (0.0 + 0.8) / 2, "intra": 0.0, "iimm": 0.2, "n_classes": 2},
    },
]
