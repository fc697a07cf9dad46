"""Push a model to a hub, or pull a model.

Tests run this module in a separate process, because huggingface_hub reads its settings on import:

python -m tests.hub_client push FOLDER REPOSITORY
python -m tests.hub_client pull REPOSITORY FOLDER
"""

import sys

from protlig_dd.hub import ProteinDiffusion

if __name__ == "__main__":
    action, source, target = sys.argv[1:]
    try:
        model = ProteinDiffusion.from_pretrained(source, device="cpu")
        if action == "push":
            print(model.push_to_hub(target))
        else:
            model.save_pretrained(target)
    except ValueError as error:
        sys.exit(f"error: {error}")
