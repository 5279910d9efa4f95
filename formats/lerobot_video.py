"""Videos of a LeRobot folder, written: many episodes one after another in a file."""

import numpy as np

from runtime import UserError

CODEC, PIXELS = "libx264", "yuv420p"
# a key frame every other frame, as LeRobot has it, so that any frame is found at once
OPTIONS = {"crf": "18", "g": "2", "bf": "0", "preset": "medium"}


def pyav():
    """PyAV. Raises UserError where it is missing: what holds no video is used without it, as on a
    GPU machine that has torch and no more.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("LeRobot's videos need the package av; run `make setup`") from error
    return av


class VideoFiles:
    """Videos of one camera; `add` appends an episode and says where it lies.

    folder, pattern: where files lie; key: the feature; fps: frames a second; size, files: bytes
    from which on a file is followed by another, and files of a chunk. info: what meta/info.json
    says of them.
    """

    def __init__(self, folder, pattern, key, fps, size, files):
        self.folder, self.pattern, self.key, self.fps = folder, pattern, key, fps
        self.size, self.files = size, files
        self.place, self.container, self.info = -1, None, {}

    def add(self, images):
        """Append an episode's images (T,S,S,3) uint8 -> its entries of meta/episodes.

        Raises UserError for a side that H.264 cannot have.
        """
        side = images.shape[1]
        if side % 2:
            raise UserError(
                f"{self.folder}: images of {side} px, a video's side is even; leave --video out"
            )
        if self.container is None or self.written > self.size:
            self._next_file(side)
        begin = self.frames
        for image in images:
            frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self.frames
            self.frames += 1
            self._write(self.stream.encode(frame))
        chunk, file = divmod(self.place, self.files)
        return {
            f"videos/{self.key}/chunk_index": chunk,
            f"videos/{self.key}/file_index": file,
            f"videos/{self.key}/from_timestamp": begin / self.fps,
            f"videos/{self.key}/to_timestamp": self.frames / self.fps,
        }

    def _next_file(self, side):
        self.close()
        self.place += 1
        chunk, file = divmod(self.place, self.files)
        name = self.pattern.format(video_key=self.key, chunk_index=chunk, file_index=file)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        self.container = pyav().open(str(self.folder / name), "w")
        self.stream = self.container.add_stream(CODEC, rate=self.fps, options=OPTIONS)
        self.stream.width = self.stream.height = side
        self.stream.pix_fmt = PIXELS
        self.frames, self.written = 0, 0
        self.info = {
            "video.height": side,
            "video.width": side,
            "video.codec": "h264",
            "video.pix_fmt": PIXELS,
            "video.is_depth_map": False,
            "video.fps": self.fps,
            "video.channels": 3,
            "has_audio": False,
        }

    def _write(self, packets):
        for packet in packets:
            self.written += packet.size
            self.container.mux(packet)

    def close(self):
        """Write what is still in the encoder, and the file's index."""
        if self.container is not None:
            self._write(self.stream.encode())
            self.container.close()
            self.container = None
