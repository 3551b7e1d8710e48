"""The platform's addresses and the proof's."""

from django.urls import path

from drydock.urls import urlpatterns as of_the_platform
from proof import views

urlpatterns = [
    *of_the_platform,
    path("api/proof", views.api_requests),
    path("api/proof/<uuid:request_id>", views.api_request, name="api-proof"),
]
