# The site of examples/, run from an installed petiole: see docker-compose.yml.
FROM python:3.13-slim

# The sources go to a folder of their own: in the working folder they would hide the installed package's parts.
COPY . /source
RUN pip install --no-cache-dir '/source[postgres,flower]' \
    && mkdir /app && mv /source/examples /app/examples && rm -rf /source \
    && useradd --create-home petiole

WORKDIR /app
USER petiole
CMD ["celery", "-A", "examples.site.app", "worker"]
