"""An app with the reference settings: ``celery -A petiole.tasks worker``."""

from celery import Celery

app = Celery("petiole")
app.config_from_object("petiole.celeryconfig")
