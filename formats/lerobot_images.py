"""Single images of a LeRobot episode, as they are stored: of a video, or of the Parquet file."""

import io

import numpy as np

from formats.lerobot_tables import AGAIN, guarded, open_parquet
from formats.lerobot_video import pyav
from formats.smith300 import open_image, square_image
from runtime import UserError


def check_videos(episodes, fps):
    """Raise UserError where a video is missing, damaged at its ends, or shorter than its rows."""
    last = {}
    for episode in episodes:
        end = episode.start + episode.length / fps
        last[episode.video] = max(last.get(episode.video, 0.0), end)
    for path, end in last.items():
        with guarded(path), pyav().open(str(path)) as container:
            stream = _stream(path, container)
            needed = round(end * fps)
            # 0 where the file does not say
            if stream.frames and stream.frames < needed:
                raise UserError(
                    f"{path}: has {stream.frames} frames, its episodes have {needed}; {AGAIN}"
                )


def read_video(episode, frames, fps, shape, size):
    """Central squares (N,size,size,3) uint8 of an episode's frames, as they are stored.

    A frame is found by its time, which is its index over `fps`: that of the dataset, whatever the
    robot's was. shape: (width, height) that the dataset says.
    """
    wanted = sorted(set(frames))
    images, path = {}, episode.video
    with guarded(path), pyav().open(str(path)) as container:
        stream = _stream(path, container)
        origin = float((stream.start_time or 0) * stream.time_base)
        time_of = lambda frame: origin + episode.start + frame / fps
        # to the key frame at or before the first, from which on all are decoded
        container.seek(int(time_of(wanted[0]) / stream.time_base), stream=stream)
        for picture in container.decode(stream):
            # in frames from the one that is looked for next
            late = (float(picture.pts * stream.time_base) - time_of(wanted[0])) * fps
            if late > 0.5:
                break
            if late > -0.5:
                _check_size(path, (picture.width, picture.height), shape)
                images[wanted.pop(0)] = square_image(picture.to_ndarray(format="rgb24"), size)
                if not wanted:
                    break
    if wanted:
        raise UserError(f"{path}: has no frame {wanted[0]} of episode {episode.index}; {AGAIN}")
    return np.stack([images[i] for i in frames])


def _stream(path, container):
    if not container.streams.video:
        raise UserError(f"{path}: holds no video; {AGAIN}")
    stream = container.streams.video[0]
    # FFmpeg's builds differ in their decoders: PyAV's own wheels have H.264, HEVC and AV1
    if stream.codec_context is None:
        wheel = f"pip install --force-reinstall av=={pyav().__version__}"
        raise UserError(
            f"{path}: this installation's PyAV has no decoder for its video; install PyAV's own "
            f"wheel ({wheel}), or encode the video as H.264 or AV1"
        )
    return stream


def read_embedded(episode, frames, name, shape, size):
    """Central squares (N,size,size,3) uint8 of an episode's frames, from PNG or JPG in the Parquet
    file's column `name`, as they are stored. shape: (width, height) that the dataset says.
    """
    path, images = episode.file, {}
    rows = {episode.first_row + i: i for i in frames}
    with guarded(path), open_parquet(path) as file:
        begin = 0
        # a group of rows is read only if it has one that is asked for
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            inside = [row for row in rows if begin <= row < end]
            column = file.read_row_group(group, [name])[name] if inside else ()
            for row in inside:
                images[rows[row]] = column[row - begin].as_py()
            begin = end
    return np.stack(
        [_decoded(images[i], f"{path}: {name}, frame {i}", shape, size) for i in frames]
    )


def _decoded(cell, where, shape, size):
    data = cell.get("bytes") if isinstance(cell, dict) else None
    if not data:
        raise UserError(f"{where}: holds no image; {AGAIN}")
    with open_image(io.BytesIO(data), where, AGAIN) as image:
        _check_size(where, image.size, shape)
        return square_image(image, size)


def _check_size(where, found, shape):
    if tuple(found) != tuple(shape):
        raise UserError(
            f"{where}: the image is {found[0]}x{found[1]}, meta/info.json says "
            f"{shape[0]}x{shape[1]}; {AGAIN}"
        )
