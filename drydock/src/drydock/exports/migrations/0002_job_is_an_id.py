from django.db import migrations, models


class Migration(migrations.Migration):
    """Finished jobs are pruned: nothing refers to them by a foreign key any more. The column and its values stay."""

    dependencies = [("exports", "0001_initial")]

    operations = [
        migrations.AlterField("export", "job", models.UUIDField(null=True, unique=True, db_column="job_id")),
        migrations.RenameField("export", "job", "job_id"),
        migrations.AlterField("export", "job_id", models.UUIDField(null=True, unique=True)),
    ]
