"""Records written byte by byte from the published formats, with nothing of the kit.

tensorflow/core/example/{example,feature}.proto and protobuf's encoding guide. Every freedom that
the formats leave to a writer is an argument here.
"""

import struct


def varint(value, *, overlong=False):
    value &= (1 << 64) - 1  # negative numbers are written as two's complement of 64 bits
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    if overlong:
        encoded[-1] |= 0x80
        encoded.append(0)
    return bytes(encoded)


def message(number, payload, *, overlong=False):
    return varint(number << 3 | 2) + varint(len(payload), overlong=overlong) + payload


def byte_strings(*values, overlong=False):
    return message(1, b"".join(message(1, v, overlong=overlong) for v in values))


def floats(values, *, packed=True):
    numbers = [struct.pack("<f", value) for value in values]
    if packed:
        return message(2, message(1, b"".join(numbers)))
    return message(2, b"".join(varint(1 << 3 | 5) + number for number in numbers))


def integers(values, *, packed=True):
    numbers = [varint(value) for value in values]
    if packed:
        return message(3, message(1, b"".join(numbers)))
    return message(3, b"".join(varint(1 << 3) + number for number in numbers))


def entry(key, value, *, value_first=False):
    parts = [message(1, key.encode()), message(2, value)]
    return message(1, b"".join(parts[::-1] if value_first else parts))


def feature_list(features):
    return b"".join(message(1, feature) for feature in features)


def record(context, lists=None, *, lists_first=False, value_first=False):
    """A ``SequenceExample`` of features and lists of features, in the order of the mappings."""
    parts = [message(1, b"".join(entry(k, v, value_first=value_first) for k, v in context.items()))]
    if lists is not None:
        entries = [
            entry(key, feature_list(features), value_first=value_first)
            for key, features in lists.items()
        ]
        parts.append(message(2, b"".join(entries)))
    return b"".join(parts[::-1] if lists_first else parts)


def frame_record(name="video", labels=(1,), **frames):
    """A frame-level record of uint8 arrays ``(T, D)``."""
    return record(
        {"id": byte_strings(name.encode()), "labels": integers(labels)},
        {key: [byte_strings(bytes(row)) for row in array] for key, array in frames.items()},
    )


def rated_record(video, starts, labels, scores, *, lists=None, **others):
    """A frame-level record with ratings of segments, as YouTube-8M's of 2019 have them."""
    return record(
        {
            "id": byte_strings(video.encode()),
            "labels": integers([1]),
            "segment_start_times": integers(starts),
            "segment_end_times": integers([start + 5 for start in starts]),
            "segment_labels": integers(labels),
            "segment_scores": floats(scores),
        }
        | others,
        lists or {"rgb": [byte_strings(bytes(3))], "audio": [byte_strings(bytes(2))]},
    )
