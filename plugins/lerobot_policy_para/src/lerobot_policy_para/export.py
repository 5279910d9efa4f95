"""Write a checkpoint as the folder that `lerobot-eval --policy.path=FOLDER` takes.

python -m lerobot_policy_para.export CHECKPOINT FOLDER
"""

import argparse

import lerobot_policy_para as plugin
from runtime import run_script


def export(checkpoint, folder, device="cpu"):
    """Write config.json, model.safetensors and both processors' files into a folder."""
    from lerobot_policy_para.modeling_para import ParaPolicy

    config = plugin.ParaConfig(checkpoint=str(checkpoint), device=device)
    ParaPolicy(config).save_pretrained(folder)
    for processor in plugin.make_para_pre_post_processors(config):
        processor.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a .safetensors file of train.py's")
    parser.add_argument("folder", help="a new one")
    args = parser.parse_args()
    export(args.checkpoint, args.folder)
    print(f"lerobot-eval --policy.path={args.folder}")


if __name__ == "__main__":
    run_script(main)
