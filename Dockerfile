# A server's image: Python, NumPy, ONNX Runtime and the kit without its libraries for training.
#   docker build -t ensemble-kit .
#   docker run --rm -v "$PWD:/work:ro" ensemble-kit /work/tag.py
FROM python:3.13-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY ensemble_kit ensemble_kit
COPY models models
RUN pip install --no-cache-dir numpy onnxruntime && pip install --no-cache-dir --no-deps .
RUN useradd --system --no-create-home tagger
USER tagger
ENTRYPOINT ["python"]
