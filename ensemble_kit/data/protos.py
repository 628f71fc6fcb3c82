"""``tf.train.SequenceExample`` for protobuf, without TensorFlow.

The fields and numbers are those of tensorflow/core/example/{example,feature}.proto, with changes
that leave the bytes as they are:

- Maps are lists of their entries and keys are bytes, so that a writer chooses the order and a key
  that is not UTF-8 stops no reader.
- ``RawExample`` leaves the value of an entry as the bytes of its ``Feature`` or ``FeatureList``.
  Protobuf allows a value in several parts; joined, they are the whole.
- An ``Example`` is read as the ``SequenceExample`` that has only a context.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "ensemble_kit"
_Field = descriptor_pb2.FieldDescriptorProto

# message -> (field, number, type or the message it holds, repeated)
_MESSAGES: dict[str, list[tuple[str, int, int | str, bool]]] = {
    "BytesList": [("value", 1, _Field.TYPE_BYTES, True)],
    "FloatList": [("value", 1, _Field.TYPE_FLOAT, True)],
    "Int64List": [("value", 1, _Field.TYPE_INT64, True)],
    "Feature": [
        ("bytes_list", 1, "BytesList", False),
        ("float_list", 2, "FloatList", False),
        ("int64_list", 3, "Int64List", False),
    ],
    "FeatureList": [("feature", 1, "Feature", True)],
    "FeatureEntry": [("key", 1, _Field.TYPE_BYTES, False), ("value", 2, "Feature", False)],
    "Features": [("feature", 1, "FeatureEntry", True)],
    "FeatureListEntry": [("key", 1, _Field.TYPE_BYTES, False), ("value", 2, "FeatureList", False)],
    "FeatureLists": [("feature_list", 1, "FeatureListEntry", True)],
    "SequenceExample": [
        ("context", 1, "Features", False),
        ("feature_lists", 2, "FeatureLists", False),
    ],
    "RawEntry": [("key", 1, _Field.TYPE_BYTES, False), ("value", 2, _Field.TYPE_BYTES, True)],
    "RawFeatures": [("feature", 1, "RawEntry", True)],
    "RawExample": [
        ("context", 1, "RawFeatures", False),
        ("feature_lists", 2, "RawFeatures", False),
    ],
}


def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="ensemble_kit/example.proto", package=PACKAGE, syntax="proto3"
    )
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        if message_name == "Feature":
            message.oneof_decl.add(name="kind")
        for field_name, number, held, is_repeated in fields:
            field = message.field.add(name=field_name, number=number)
            field.label = _Field.LABEL_REPEATED if is_repeated else _Field.LABEL_OPTIONAL
            if isinstance(held, str):
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{held}"
            else:
                field.type = held
            if message_name == "Feature":
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _message_classes()
Feature = _CLASSES["Feature"]
FeatureList = _CLASSES["FeatureList"]
SequenceExample = _CLASSES["SequenceExample"]
RawExample = _CLASSES["RawExample"]
