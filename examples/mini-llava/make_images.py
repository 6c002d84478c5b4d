"""Writes the example pictures and their questions to ``images/``: held-out scenes outside the evaluation's 1,000."""

from __future__ import annotations

import json
import random
from pathlib import Path

from scenes import ask, make_scene, render

FOLDER = Path(__file__).resolve().parent / "images"

# seed of the held-out scene, task asked, file type
EXAMPLES = (
    (5001, "existence", "png"),
    (5010, "counting", "png"),
    (5003, "colour", "png"),
    (5004, "relation", "png"),
    (5005, "digit", "png"),
    (5006, "caption", "png"),
    (5008, "relation", "jpg"),
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    listed = []
    for seed, task, suffix in EXAMPLES:
        scene = make_scene(seed, "heldout")
        name = f"scene-{seed}.{suffix}"
        image = render(scene)
        if suffix == "jpg":
            image.save(FOLDER / name, quality=97, subsampling=0)
        else:
            image.save(FOLDER / name)
        question, answer = ask(scene, task, random.Random(f"example:{seed}"))
        listed.append({"image": name, "task": task, "question": question, "answer": answer})
    (FOLDER / "questions.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main()
