"""Push a model to a hub, or pull one, in a process of its own: huggingface_hub reads its settings when it is imported.

python -m tests.hub_client push FOLDER REPOSITORY
python -m tests.hub_client pull REPOSITORY FOLDER
"""

import sys

from protlig_dd.hub import ProteinDiffusion

if __name__ == "__main__":
    what, source, target = sys.argv[1:]
    try:
        model = ProteinDiffusion.from_pretrained(source, device="cpu")
        if what == "push":
            print(model.push_to_hub(target))
        else:
            model.save_pretrained(target)
    except ValueError as error:
        sys.exit(f"error: {error}")
