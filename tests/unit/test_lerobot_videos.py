"""Videos as public LeRobot datasets have them: AV1, which LeRobot writes by itself, in both
versions of the format. Its own loader is not asked, PyAV's decoder is.
"""

import json
import shutil

import av
import numpy as np
import pytest
from helpers import nearest_is_its_own
from test_lerobot import EPISODES, MP4, as_version_2, change_json, copied

import convert_demos
from formats.dataset import open_dataset
from runtime import UserError

KEY = "observation.images.image"
# what LeRobot gives its encoder: quality, and a key frame every other frame
LEROBOTS = {"crf": "30", "g": "2", "preset": "12"}


@pytest.fixture(scope="module")
def h264(synthetic_demos, tmp_path_factory):
    """The synthetic demonstrations as a LeRobot folder with an H.264 video."""
    out = tmp_path_factory.mktemp("videos") / "h264"
    convert_demos.main([str(synthetic_demos), "--out", str(out), "--video"])
    return out


def encode(path, frames, codec, fps=20):
    """Write frames (N,S,S,3) as a video that LeRobot might have written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=LEROBOTS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def as_av1(folder, tmp_path):
    """A copy whose video is AV1; skipped where this PyAV cannot write any."""
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV has no AV1 encoder")
    copy = copied(folder, tmp_path)
    encode(copy / MP4, frames_of(folder / MP4), "libsvtav1")
    return copy


def as_version_2_videos(folder, out):
    """Version 2.1 of a folder with a video: a file an episode, of AV1."""
    as_version_2(folder, out)
    lengths = [len(d) for d in open_dataset(folder).demos]
    ends = np.cumsum(lengths)
    for i, frames in enumerate(np.split(frames_of(folder / MP4), ends[:-1])):
        encode(out / f"videos/chunk-000/{KEY}/episode_{i:06d}.mp4", frames, "libsvtav1")
    path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    change_json(out / "meta/info.json", video_path=path, chunks_size=1000)
    return out


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_av1_videos_are_read_as_h264_is(h264, tmp_path, version):
    """Each frame is that of its index, within what compression changes: the blob's colour is found
    where it is, in the first, a middle and the last frame of each episode.
    """
    folder = as_av1(h264, tmp_path)
    if version == "v2.1":
        folder = as_version_2_videos(folder, tmp_path / "old")
    said = json.loads((folder / "meta/info.json").read_text())
    assert said["codebase_version"] == version
    red = lambda images: images[..., 0].astype(int) - images[..., 1] > 90
    for a, b in zip(open_dataset(h264).demos, open_dataset(folder).demos, strict=True):
        frames = [len(a) - 1, 0, 11]
        before, after = a.images(frames), b.images(frames)
        assert red(before).any((1, 2)).all()
        assert (red(before) != red(after)).mean() < 0.02
        # what one frame's movement would change
        assert np.abs(before.astype(int) - after).mean() < 15
        one_by_one = np.concatenate([b.images([i]) for i in range(len(b))])
        nearest_is_its_own(one_by_one, a.images(range(len(a))))
    with av.open(str(next((folder / "videos").rglob("*.mp4")))) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "av1"


def test_a_codec_without_a_decoder_is_named(h264, tmp_path):
    """Before anything is trained, with what to install. The video claims to be AVS3, for which
    PyAV's wheels have no decoder.
    """
    copy = shutil.copytree(h264, tmp_path / "copy")
    path = copy / MP4
    path.write_bytes(path.read_bytes().replace(b"avc1", b"avs3"))
    with pytest.raises(UserError, match=r"file-000\.mp4: .*no decoder.*pip install") as error:
        open_dataset(copy)
    assert "\n" not in str(error.value) and (copy / EPISODES).is_file()
