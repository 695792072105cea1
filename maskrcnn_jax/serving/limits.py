"""What a service accepts before it refuses."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a service; each keeps one kind of request from taking all memory or time."""

    max_bytes: int = 20_000_000  # of an uploaded file
    max_pixels: int = 50_000_000  # of an image; 150 MB decoded
    max_queue: int = 32  # images that are uploaded, wait or are computed at the same time
    max_batch: int = 8  # images that are computed together, a power of two
    timeout: float = 60.0  # seconds for the upload, and again for the answer
