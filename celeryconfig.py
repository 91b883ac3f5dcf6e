"""The reference Celery settings for a shop on Redis: what to set, and on each line why.

Use them as they are, ``app.config_from_object("petiole.celeryconfig")``, or copy the lines that fit. ``REDIS_URL`` (or
``REDIS_HOST`` and its kin) says where Redis is; ``CELERY_BROKER_URL`` and ``CELERY_RESULT_BACKEND`` where broker
and results are, when that is another server. In production it should be: broker, results and buffers need
``noeviction``, a cache may want ``volatile-lru``, and eviction is a setting of the whole server.
"""

import os

from petiole.cachelib import Settings

_redis_url = Settings.read().url

# Broker

broker_url = os.environ.get("CELERY_BROKER_URL", _redis_url)
broker_connection_retry_on_startup = True  # a worker that starts before Redis waits for it
broker_connection_max_retries = None  # and goes on trying: a supervisor's restart would lose the prefetched tasks
broker_pool_acquire_timeout = 30  # a pool that ran dry raises; without this a web request hangs for ever
broker_transport_options = {
    "visibility_timeout": 7_200,  # above task_time_limit and every countdown, or Redis hands a running task out again
    "socket_timeout": 30,  # a publish to a server that hangs fails; the transport's default waits for ever
    "socket_connect_timeout": 5,  # likewise for a connection
    "socket_keepalive": True,  # a firewall that drops idle connections is noticed
    "health_check_interval": 25,  # and so is a server that was replaced
    "max_retries": 2,  # a publish that finds no broker raises within a second; the default tries for six
    "interval_start": 0.1,
    "interval_step": 0.2,
    "interval_max": 0.5,
    "client_name": "celery-broker",  # CLIENT LIST tells who is who
}
task_publish_retry_policy = {  # a publish that cannot be made raises within a second
    "max_retries": 3,
    "interval_start": 0.1,
    "interval_step": 0.2,
    "interval_max": 0.5,
}

# Delivery: every task at least once, none for ever

task_acks_late = True  # a task whose worker dies is delivered again; make tasks that may run twice
task_retry_on_worker_lost = True  # also when only its pool process dies; bounded by max_retries, unlike a rejection
task_acks_on_failure = True  # a task that raised is done; a retry is a message of its own
task_acks_on_timeout = True  # and so is one that ran out of time
worker_cancel_long_running_tasks_on_connection_loss = True  # their messages come again: do not run them beside it
worker_prefetch_multiplier = 1  # a long task holds back no more than one other per process
worker_eta_task_limit = 1_000  # a worker's memory is no place for a backlog of countdowns
task_time_limit = 1_800  # no task holds a process for ever
task_soft_time_limit = 1_740  # and it has a minute to end by itself

# Workers

worker_soft_shutdown_timeout = 30  # on SIGQUIT, or SIGTERM with REMAP_SIGTERM=SIGQUIT: running tasks may finish
worker_enable_soft_shutdown_on_idle = True  # countdowns in memory go back to the queue first
worker_max_tasks_per_child = 10_000  # a slow leak never becomes an incident
worker_max_memory_per_child = 512_000  # KiB; nor does a fast one
worker_state_db = os.environ.get("CELERY_WORKER_STATE_DB")  # a file: revoked tasks stay revoked after a restart
worker_hijack_root_logger = False  # the application decides where its log goes
worker_send_task_events = True  # Flower sees the tasks
task_send_sent_event = True  # also those that still wait
task_track_started = True  # and those that run

# Queues and messages

task_default_queue = "default"  # named, so that a typing error in a route is one
task_create_missing_queues = False  # and does not make a queue that nobody reads
accept_content = ["json"]  # nothing that comes from Redis is unpickled
task_serializer = "json"
result_serializer = "json"
enable_utc = True  # one time for all
timezone = "UTC"

# Results

result_backend = os.environ.get("CELERY_RESULT_BACKEND", _redis_url)
result_expires = 3_600  # results are for those who wait, not an archive
result_extended = True  # name and arguments too, for people who look
task_ignore_result = True  # ask for a result where there is a reader: @app.task(ignore_result=False)
task_store_errors_even_if_ignored = True  # what failed can always be looked up
result_backend_always_retry = True  # a result is worth a second try
result_backend_max_retries = 10  # and not worth the default, which is infinity
redis_socket_timeout = 5  # a backend that hangs fails
redis_socket_connect_timeout = 5
redis_socket_keepalive = True
redis_backend_health_check_interval = 25
redis_client_name = "celery-results"

# Beat

beat_max_loop_interval = 5  # a schedule that changed is followed within seconds
beat_enable_remote_control = True  # a probe can ask beat whether it is alive
