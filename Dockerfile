# Training on TPU hosts: docker build -t IMAGE . && docker push IMAGE
FROM python:3.11-slim
WORKDIR /app
# The packages first: a change of the code does not install them again.
COPY requirements/train.txt requirements/tpu.txt requirements/
RUN pip install --no-cache-dir -r requirements/train.txt -r requirements/tpu.txt
COPY moe_jax moe_jax
COPY configs configs
COPY launch launch
CMD ["python", "-m", "moe_jax", "configs"]
