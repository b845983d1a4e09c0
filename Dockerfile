# An image of the package from a folder of wheels, without a network: `make wheels`, then
#   docker build --network none --tag furiosa-llm .
FROM python:3.11-slim
COPY build/wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels 'furiosa-llm-onnx[serve]'
USER nobody
WORKDIR /work
ENTRYPOINT ["furiosa-llm"]
