from django.db import migrations, models


class Migration(migrations.Migration):
    """Finished jobs are pruned: nothing refers to them by a foreign key any more. The column and its values stay."""

    dependencies = [("documents", "0001_initial")]

    operations = [
        migrations.AlterField("revision", "job", models.UUIDField(null=True, unique=True, db_column="job_id")),
        migrations.RenameField("revision", "job", "job_id"),
        migrations.AlterField("revision", "job_id", models.UUIDField(null=True, unique=True)),
    ]
