"""Pictures of rotations: the values on a principal axis, what is predicted of them over an episode, and gripper commands."""

from plots import _save, plt

BLUE = "#4477aa"


def rotation_histogram(values, ratios, episodes, chosen, path):
    """Distribution of the values on each space's principal axis, {space: (N,) deg}, with the explained-variance ratios, and the
    chosen space's values over each episode's frames [(T,) deg]."""
    figure, axes = plt.subplots(1, len(values) + 1, figsize=(4.2 * (len(values) + 1), 3.2))
    for axis, (space, v) in zip(axes, values.items()):
        axis.hist(v, bins=48, color=BLUE)
        axis.set(title=f"{space}: {', '.join(f'{r:.3f}' for r in ratios[space])} of variance", xlabel="value on the axis (deg)", ylabel="frames")
    for episode in episodes:
        axes[-1].plot(episode, color=BLUE, alpha=0.4, linewidth=0.8)
    axes[-1].set(title=f"{chosen}: every episode", xlabel="frame", ylabel="value on the axis (deg)")
    figure.tight_layout()
    _save(figure, path)
