"""What worker and beat processes import: the shop that the environment names."""

import os

from shop import make

shop = make(os.environ["SHOP_REDIS_URL"], os.environ["SHOP_DATABASE_URL"], os.environ["SHOP_NAME"])
app = shop.app
